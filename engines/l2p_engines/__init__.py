"""Profiles that engines are built for."""
