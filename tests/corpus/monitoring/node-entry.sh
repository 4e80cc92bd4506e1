#!/bin/sh -e
echo "node_meta{node_id=\"$NODE_ID\"} 1" > /etc/node-exporter/node.prom
exec /bin/node_exporter "$@"
