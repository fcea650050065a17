"""Tests of cppo.study."""
