#!/bin/sh
# The last lines of `docker compose up`.
cat <<TEXT

The fleet is up. Try it, from another terminal:

  curl http://127.0.0.1:$PORT/v1/chat/completions -H 'content-type: application/json' -d '{"model": "any", "messages": [{"role": "user", "content": "hello"}]}'

The load of every rank:
  curl http://127.0.0.1:$ADMIN_PORT/loads

The engines' own placement against dp-extproc, as tables:
  docker compose --profile load run --rm load

One more decode engine, and one less again; it ends when its last request has ended:
  docker compose up --detach --scale decode=3
  docker compose up --detach --scale decode=2

An engine fails and restarts:
  docker kill \$(docker compose ps --quiet decode | head -n 1)
  docker compose start decode

TEXT
exec sleep infinity
