/** @type {import('next').NextConfig} */
export default {
  turbopack: { root: import.meta.dirname }, // or a lockfile further up is taken for the project's
}
