"""One rank of a run of any size, rehearsed in one process: a real engine, imagined numbers and peers."""
