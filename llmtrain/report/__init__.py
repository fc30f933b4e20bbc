"""What a run folder tells: where a run is, and a page about one run or several."""
