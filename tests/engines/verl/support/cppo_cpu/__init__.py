"""Support code that runs inside verl's processes in the end-to-end tests. Not part of the package."""
