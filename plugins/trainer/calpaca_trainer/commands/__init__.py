"""The subcommands of `calpaca train`, one file each."""
