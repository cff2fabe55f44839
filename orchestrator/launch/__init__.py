"""Everything that speaks Ray."""
