"""Time and memory: `find`, its rivals, every finder, edits, many photographs."""
