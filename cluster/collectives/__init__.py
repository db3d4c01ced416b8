"""Sums, gathers and sends between ranks, by each path that exists, behind one Protocol."""
