"""`python -m rwkvir` is the `basicsr` command, for launchers that start modules."""

from rwkvir.cli import main

raise SystemExit(main())
