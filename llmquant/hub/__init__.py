"""`push`: may we, upload, comparison afterwards; the Hub's failures in words."""
