"""What outlives every process: the lock of the storage folder, and each model's journal."""
