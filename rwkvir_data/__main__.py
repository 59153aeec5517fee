"""`python -m rwkvir_data` is the `resyn` command."""

from rwkvir_data.cli import main

raise SystemExit(main())
