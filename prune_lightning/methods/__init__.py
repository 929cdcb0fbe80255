"""Editing methods: each a LightningModule that turns requests into weight updates."""
