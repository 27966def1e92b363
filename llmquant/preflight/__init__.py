"""What `plan`, `inspect` and `doctor` know before any work: memory, disk, time, schemes, versions; plain data."""
