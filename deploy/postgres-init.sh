#!/bin/sh
# Runs once, on an empty volume: a role that owns the farm's database and nothing else.
set -eu
psql --username postgres --set ON_ERROR_STOP=1 --set password="$DATABASE_PASSWORD" <<'SQL'
CREATE ROLE farm LOGIN PASSWORD :'password';
CREATE DATABASE farm OWNER farm;
REVOKE ALL ON DATABASE farm FROM PUBLIC;
SQL
