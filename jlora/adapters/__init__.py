"""Adapters: read from a PEFT folder, kept in three tiers, written to rank pages on the device."""
