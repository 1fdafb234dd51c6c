"""The transport under Klein and treq."""
