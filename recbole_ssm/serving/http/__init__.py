"""Recommendations and live sessions over HTTP; needs the extra ``serve``."""
