"""The subcommands, a screen each: options in, one study called, records out. Nothing is computed here."""
