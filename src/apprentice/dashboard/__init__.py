"""What a person sees in a browser: one self-contained page of a store, and the pages that the gateway serves.

`pages` makes HTML of values and needs jinja2; `routes` serves them and needs the extra `gateway`, which has both.
"""
