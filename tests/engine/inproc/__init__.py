"""Engine tests in one process: a real `Scheduler`, without HTTP, for any architecture."""
