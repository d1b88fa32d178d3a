# Of schema.sql, what a single ClickHouse server takes: no Distributed tables, no replicas, one name for each table.
/^CREATE TABLE .* ENGINE = Distributed(/d
s/_local\>//g
s/Replicated\([A-Za-z]*MergeTree\)('[^']*', '{replica}'\(, \)\{0,1\}/\1(/
