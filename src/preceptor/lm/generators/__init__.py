"""Engines that write continuations, behind one protocol, and the audit that stands behind each of them."""
