"""Many pairs in one run: the list, the pipeline, the results and the page about them."""
