"""Headers that go with every response."""

# Everything comes from here: no inline script, nothing that is evaluated, no frame around us; no other site is told a URL, but a
# form of ours says where it comes from (pages/sign_in.py). The hash is that of an
# empty style element, which plotly makes and then fills through the CSSOM.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; connect-src 'self'; img-src 'self'; "
        "style-src 'self' 'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}
