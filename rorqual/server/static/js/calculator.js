// Arithmetic for the page's calculator tool: a parser of its own, nothing is ever evaluated as a program.

const FUNCTIONS = { sqrt: Math.sqrt, abs: Math.abs, round: Math.round, floor: Math.floor, ceil: Math.ceil,
  ln: Math.log, log: Math.log10, exp: Math.exp, sin: Math.sin, cos: Math.cos, tan: Math.tan };
const CONSTANTS = { pi: Math.PI, e: Math.E };
const DEEPEST = 100;

// The value of an expression such as `2 * (3 + 4) ^ 2`. Throws an Error that says where it is none.
export function calculate(text) {
  const tokens = [...text.matchAll(/\s*(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+|[a-z]+|\*\*|\S)/gi)].map((found) => found[1]);
  let at = 0, depth = 0;
  const peek = () => tokens[at];
  const fail = () => {
    throw new Error(`Cannot read ${JSON.stringify(text.slice(0, 100))} at ${JSON.stringify(peek() ?? "its end")}: ` +
      "use numbers, + - * / % ^, brackets and " + Object.keys(FUNCTIONS).join(", ") + ".");
  };
  const expect = (token) => { if (tokens[at++] !== token) { at -= 1; fail(); } };

  function sum() {
    if (++depth > DEEPEST) fail();
    let value = product();
    while (peek() === "+" || peek() === "-") value = tokens[at++] === "+" ? value + product() : value - product();
    depth -= 1;
    return value;
  }

  function product() {
    let value = signed();
    while (["*", "/", "%", "×", "÷"].includes(peek())) {
      const sign = tokens[at++], other = signed();
      value = sign === "*" || sign === "×" ? value * other : sign === "%" ? value % other : value / other;
    }
    return value;
  }

  function signed() {
    if (++depth > DEEPEST) fail();
    let value;
    if (peek() === "-" || peek() === "+") value = tokens[at++] === "-" ? -signed() : signed();
    else {
      value = atom();
      if (peek() === "^" || peek() === "**") {
        at += 1;
        value = value ** signed();
      }
    }
    depth -= 1;
    return value;
  }

  function atom() {
    const token = peek();
    if (token === undefined) fail();
    if (/^[\d.]/.test(token) && Number.isFinite(Number(token))) {
      at += 1;
      return Number(token);
    }
    if (token === "(") {
      at += 1;
      const value = sum();
      expect(")");
      return value;
    }
    const name = token.toLowerCase();
    if (Object.hasOwn(CONSTANTS, name)) {
      at += 1;
      return CONSTANTS[name];
    }
    if (!Object.hasOwn(FUNCTIONS, name)) fail();
    at += 1;
    expect("(");
    const value = FUNCTIONS[name](sum());
    expect(")");
    return value;
  }

  const value = sum();
  if (at < tokens.length) fail();
  return value;
}
