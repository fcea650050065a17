"""The program `cppo`; a file a command, `app` puts them together."""
