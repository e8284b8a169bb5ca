#!/usr/bin/env bash
# memcached's protocol (get, set, incr) by shells, children and pipes, in three parts:
#
#   inetd.py ---- one `shell.sh talk` for each connection ---- head, gzip, mv for each request
#                        |        ^
#                  questions    reply.PID      named pipes
#                        v        |
#                 `shell.sh count`, which has the counters in its memory
#
# Values are files in the container's own memory: their length in the first line, then gzip.
set -u
values=/dev/shm/values
questions=/dev/shm/questions

# Answers `incr KEY PIPE`, `get KEY PIPE` and `forget KEY PIPE` by one line in the pipe.
count() {
    declare -A counters
    local verb key pipe
    while read -r verb key pipe <&3; do
        case $verb in
            incr)
                if [ -z "${counters[$key]-}" ]; then
                    counters[$key]=$({ read -r _ && gzip -dc; } <"$values/$key")
                fi
                counters[$key]=$((counters[$key] + 1))
                ;;
            forget) unset "counters[$key]" ;;
        esac
        echo "${counters[$key]--}" >"$pipe"
    done
}

# Puts a question to `count`; its answer is in $answer.
ask() {
    echo "$1 $2 $pipe" >&3
    read -r answer <&4
}

talk() {
    local verb key rest length answer
    pipe=/dev/shm/reply.$$
    mkfifo "$pipe"
    exec 3>"$questions" 4<>"$pipe"
    trap 'rm -f "$pipe"' EXIT
    while read -r verb key rest; do
        key=${key%$'\r'} rest=${rest%$'\r'}
        case $verb in
            set)
                length=${rest##* }
                { echo "$length" && head -c "$length" | gzip -1; } >"$values/$key.new"
                mv "$values/$key.new" "$values/$key"
                read -r _
                ask forget "$key"
                printf 'STORED\r\n'
                ;;
            incr)
                ask incr "$key"
                printf '%s\r\n' "$answer"
                ;;
            get)
                ask get "$key"
                if [ "$answer" != - ]; then
                    printf 'VALUE %s 0 %d\r\n%s\r\nEND\r\n' "$key" "${#answer}" "$answer"
                elif [ -f "$values/$key" ]; then
                    {
                        read -r length
                        printf 'VALUE %s 0 %d\r\n' "$key" "$length"
                        gzip -dc
                        printf '\r\nEND\r\n'
                    } <"$values/$key"
                else
                    printf 'END\r\n'
                fi
                ;;
            *) printf 'ERROR\r\n' ;;
        esac
    done
}

case ${1-} in
    talk) talk ;;
    count) count ;;
    *)
        mkdir -p "$values"
        mkfifo "$questions"
        # Open for reading and writing, so that it never ends.
        exec 3<>"$questions"
        "$BASH" "$0" count &
        exec python3 inetd.py 11211 "$BASH" "$0" talk
        ;;
esac
