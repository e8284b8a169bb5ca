#!/bin/sh
# Judges the files of PostgreSQL in the working directory, which is a copy: the server must start on them,
# pg_amcheck must find nothing in any table or index, and the accounts of pgbench must add up.
set -eu
at=$(pwd)
# Debian has the server in no PATH.
postgres=$(command -v postgres || ls /usr/lib/postgresql/*/bin/postgres | tail -n 1)
bin=$(dirname "$(realpath "$postgres")")
as="setpriv --reuid postgres --regid postgres --clear-groups"
# Only this script and the server get there.
chown postgres: "$at"
chmod 755 "$at/.."
rm -f data/postmaster.pid
# It may not run by then, which is no failure of the check.
trap '$as "$bin/pg_ctl" -D "$at/data" -m immediate stop >/dev/null 2>&1 || true' EXIT
if ! $as "$bin/pg_ctl" -D "$at/data" -w -t 60 -l "$at/log" \
    -o "-c huge_pages=off -c listen_addresses= -c unix_socket_directories=$at" start >/dev/null; then
    cat log
    exit 1
fi
$as "$bin/pg_amcheck" -h "$at" -U postgres --heapallindexed --parent-check -d postgres
sums="select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches),
 (select sum(tbalance) from pgbench_tellers), (select coalesce(sum(delta), 0) from pgbench_history)"
sums=$($as psql -h "$at" -U postgres -Atc "$sums" postgres)
echo "$sums" | tr '|' '\n' | uniq | wc -l | grep -qx 1 || {
    echo "the accounts do not add up: $sums"
    exit 1
}
grep -E 'PANIC|FATAL|corrupt' log && exit 1
exit 0
