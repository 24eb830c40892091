// node nodemailer_pool.js PORT CONNECTIONS SENDER SUBJECT BODY
//
// A sender as ../sender.py, with one job, ["batch", COUNT]: that many messages over a new
// pool. Answers with the seconds it took.
"use strict";

const nodemailer = require("nodemailer");
const readline = require("readline");

const [port, maxConnections] = process.argv.slice(2).map(Number);
const [from, subject, text] = process.argv.slice(4);

async function send(count) {
  const start = process.hrtime.bigint();
  const transport = nodemailer.createTransport({
    host: "127.0.0.1",
    port,
    pool: true,
    maxConnections,
    ignoreTLS: true,
  });
  const sent = [];
  for (let number = 0; number < count; number++) {
    sent.push(
      transport.sendMail({
        from,
        to: `reader${number}@example.org`,
        subject: `${subject} ${number}`,
        text,
      }),
    );
  }
  await Promise.all(sent);
  const seconds = Number(process.hrtime.bigint() - start) / 1e9;
  transport.close();
  return seconds;
}

async function main() {
  console.log("ready");
  for await (const line of readline.createInterface({ input: process.stdin })) {
    const [, count] = JSON.parse(line);
    console.log(await send(count));
  }
}

main();
