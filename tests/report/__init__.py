"""Tests of cppo.report."""
