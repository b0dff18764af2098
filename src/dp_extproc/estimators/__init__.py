"""Numbers that are learned from engine samples."""
