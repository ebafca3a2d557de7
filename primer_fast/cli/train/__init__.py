"""One module a command of ``primer-fast train``, and what each trains on and draws."""
