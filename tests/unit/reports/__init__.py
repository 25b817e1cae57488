"""Tests of tinylmm.reports; a package, so that test files of equal names in other folders do not clash."""
