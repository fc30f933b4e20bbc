"""Reports from run folders: how far a run is, and a page about one run or several."""
