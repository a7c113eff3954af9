"""Other libraries' models trained with these losses; each module imports its library."""
