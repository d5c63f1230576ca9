"""The dashboard: a file per page; what they share is in templating.py, listing.py and charts.py."""
