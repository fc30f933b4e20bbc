"""Word vectors: words of a text, their counts, the kernel that trains vectors, files of vectors, and figures
of them. Free of torch."""
