from apprentice.cli import main

raise SystemExit(main())
