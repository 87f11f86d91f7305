"""The page: text, tables, figures."""
