"""How far a relay has published, where it begins again, and what it does where that is in doubt."""
