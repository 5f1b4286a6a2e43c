"""What every benchmark shares: problems, clocks, checks, rows and pages.  Separate because a package needs this file."""
