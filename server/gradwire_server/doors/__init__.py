"""Who may come in, and as whom: certificates, tokens, and what each call needs of them."""
