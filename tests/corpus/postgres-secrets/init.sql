CREATE TABLE greetings (id int PRIMARY KEY, text text);
INSERT INTO greetings VALUES (1, 'costs $5');
