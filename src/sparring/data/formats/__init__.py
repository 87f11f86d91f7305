"""Formats of data: known sets, folders, archives, tables, shards, arrays and datasets of torch."""
