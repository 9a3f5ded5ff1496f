"""Is a data set all there, and readable? And what is in it?"""
