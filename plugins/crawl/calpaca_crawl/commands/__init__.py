"""The commands of `calpaca crawl`, one in each file."""
