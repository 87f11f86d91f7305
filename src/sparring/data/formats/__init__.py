"""Forms in which data come: known sets, folders, archives, tables, shards, arrays and datasets of torch."""
