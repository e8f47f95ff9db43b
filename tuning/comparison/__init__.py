"""Runs side by side: what tells them apart, what that did to them, and how sure one can be. Built on runs' folders."""
