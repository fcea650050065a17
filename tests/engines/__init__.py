"""Contract tests of the engine adapters: one suite (`contract`) that every adapter runs through."""
