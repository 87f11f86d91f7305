"""The `.sparring` file: the packed program, its codings, and the compiler that makes one."""
