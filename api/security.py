"""Headers that go with every response."""

# Everything comes from here: no inline script, nothing that is evaluated, no frame around us. The hash is that of an
# empty style element, which plotly makes and then fills through the CSSOM. No other site is told an address of ours;
# our own forms say where they come from, which pages/sign_in.py looks at.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; connect-src 'self'; img-src 'self'; "
        "style-src 'self' 'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}
